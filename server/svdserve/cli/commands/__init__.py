"""The commands of svdserve, one file each."""
