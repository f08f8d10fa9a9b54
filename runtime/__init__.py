"""What a finished graph calls when it runs. Knows nothing of torch.fx."""
