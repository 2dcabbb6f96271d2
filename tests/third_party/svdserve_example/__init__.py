"""What a third party adds to svdserve, one file each."""
