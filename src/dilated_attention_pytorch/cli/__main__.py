"""`python -m dilated_attention_pytorch.cli` is `dilated-attention`."""

from dilated_attention_pytorch.cli import main

main()
