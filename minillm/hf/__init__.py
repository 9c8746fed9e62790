"""Folders of the Hugging Face hub. Its names stand in this package and nowhere else."""
