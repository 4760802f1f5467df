"""The libraries that cano is compared with, pinned in requirements.txt; `make bench` installs them."""
