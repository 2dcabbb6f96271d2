"""What vLLM needs of svdserve for CPU workers on several machines with Ray."""
