"""The model as the ecosystem sees it: an object of the user's own class over the store's tensors, in PEFT's wrapping.

``twin`` builds the object, ``modules`` has what its classes do otherwise, ``tuner`` stands where PEFT has its
``LoraModel``, ``named_adapters`` holds several adapters side by side, ``peft_model`` is the ``PeftModel`` around them.
"""
