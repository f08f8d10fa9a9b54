"""Graph to graph, one rewrite per file, in the order of qlora_fx/pipeline.py. Knows nothing of training."""
