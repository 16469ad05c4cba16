"""When an ES response pays: few outer variables, and runs that are long or have no derivative."""
