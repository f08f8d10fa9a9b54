"""From a model and a request to programs that run.

request     the arguments of ``transform``, ``from_pretrained`` and ``plan``, checked
check_lora  which ``LoraConfig`` can be honoured
compile     capture, pipeline, decisions; needs no weights
pipeline    the list of passes
invariants  what each pass establishes
printer     a graph as text
programs    the captured graphs over one base
recompute   ``memory_budget``: what is computed again in backward
"""
