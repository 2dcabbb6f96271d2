"""What svdserve adds to vLLM's HTTP server: routes, keys, errors, shutdown, the dashboard."""
