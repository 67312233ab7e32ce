"""The chunked algorithms in vectorised PyTorch: what runs on the CPU."""
