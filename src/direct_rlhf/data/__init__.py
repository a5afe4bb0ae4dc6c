import os

# Before anything imports `datasets`, which else counts downloads at a server of its own when local files are read.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
