"""What surrounds a training: its folder, its plan, the learning rate finder."""
