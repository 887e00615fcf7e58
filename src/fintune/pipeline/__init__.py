"""What a run is: its steps, its folders, and the runner."""
