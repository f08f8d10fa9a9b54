"""From a Hugging Face model and one call to one flat graph on fake weights.

skeleton         the model's Python without weights, and its capture
arguments        a call's arguments by name, and which calls share a graph
known_arguments  which names a model takes
adapter_rows     which adapter each row of a batch has
check_call       whether tensors fit
positions        how long a row may be, where positions are learned
check_outputs    whether what is asked for is returned
check_model      which models are accepted
example_inputs   a call where the user gives none
pictures         what models count in a call's pictures, counted before the graph
padded_pictures  the same where pictures are filled up to one size
dynamic_shapes   which sizes are free
export           one call of torch.export
export_patches   ways past what torch.export cannot follow
pictures_at_once what is done picture by picture, done for all at once
repeated_blocks  of blocks that repeat one is walked
like_blocks      which are alike
block_calls      how they are called
holders          what its modules are to PEFT
flat_graph       from the exported program to our graph
written_out      the blocks that were not walked
"""
