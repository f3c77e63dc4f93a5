"""Programs of a model: made for a call, checked at first use, run on its caches, kept on disk."""
