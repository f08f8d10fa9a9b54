"""The adapter merged into the weights.

merge        ``QLoRAModel.merge``: an ordinary checkpoint, one tensor at a time
values       each merged parameter
logit_drift  how far the merged model's logits are from the trained ones
"""
