"""Files: safetensors and GGUF, read to 4 bits and written from them.

locate       a folder, hub id or GGUF file, and its headers
empty_model  the model without weights
conversion   between a checkpoint's names and the model's
four_bit     weights that arrive in 4 bits
gguf         a GGUF file as a source
open         the model and a plan for every tensor
load         fill a store
save         ``save_quantized``
"""
