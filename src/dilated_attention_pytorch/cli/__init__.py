"""The command line: one command per file, each imported with its libraries only when it runs."""


def main() -> None:
    """Run `dilated-attention` with the arguments of this process."""
    from dilated_attention_pytorch.cli.app import app

    app()
