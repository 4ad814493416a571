"""What pytest may not import: Triton's kernels where Triton is not installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["src/dilated_attention_pytorch/backends/triton/*.py"]
