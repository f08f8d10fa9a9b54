"""What select asks.

places        which module holds a weight
targets       PEFT's rules for what a config targets
routers       which products route to experts
unrecognised  who else reads a weight
"""
