"""The command line `flexicodec-hf`."""
