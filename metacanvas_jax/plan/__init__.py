"""What a config costs on a TPU slice, found out without the TPU."""
