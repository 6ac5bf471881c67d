"""Measuring a codec or text-to-speech on a dataset, and the measures alone. Import from the modules."""
