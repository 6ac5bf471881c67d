"""Speech data: loading it, turning it into tokens, and the files of both. Import from the modules."""
