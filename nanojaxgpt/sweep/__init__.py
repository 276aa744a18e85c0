"""Many runs from one experiment file: a space of points, their plan, their run, their report."""
