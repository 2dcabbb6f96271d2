"""What stands around vLLM's HTTP server: routes, keys, errors, shutdown, the dashboard."""
