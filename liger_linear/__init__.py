"""What all packages of the distribution liger-linear share without needing torch: its version and its command line."""

__version__ = "0.1.0"

__all__ = ["__version__"]
