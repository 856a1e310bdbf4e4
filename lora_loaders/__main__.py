"""`python -m lora_loaders` is `lora-loaders`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="lora-loaders")
