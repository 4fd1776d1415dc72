"""What lies on the disk: Arrow files, tars, the doors that check them, and files written whole."""
