"""The KV cache: who owns which block of it (host)."""
