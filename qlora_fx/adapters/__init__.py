"""Adapters as PEFT has them.

initialize   new ``lora_A`` and ``lora_B``
peft_format  PEFT's names and config, and values that are taken over
"""
