"""The command line: ``qlora-fx sft | dpo | plan | explain | check | merge | generate | chat``.

main       the commands by name, and errors in one line
parser     flags and YAML from dataclasses, as transformers and TRL parse them
settings   the dataclasses
data       JSONL files, line by line
train      sft and dpo: TRL's trainers
inspect    the other commands
logs       log.jsonl and loss.png
"""
