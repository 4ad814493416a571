"""Tables for the terminal, figures as PNG, and one HTML page that needs no network: for train, validate and bench."""
