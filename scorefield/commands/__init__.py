"""What the console command ``scorefield`` does, one file a command; those of the pillars are their recipes."""
