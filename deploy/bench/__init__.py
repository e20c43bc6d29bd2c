"""What the product costs, beside a baseline measured in the same run. `python -m deploy.bench`, or `make bench`."""
