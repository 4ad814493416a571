"""Scripts for processes of their own are no tests: importing them would turn Triton's interpreter on here."""

collect_ignore = ["interpreted.py", "compiled.py"]
