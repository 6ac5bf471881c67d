"""A server of speech and tokens over HTTP: `flexicodec-hf serve`."""
