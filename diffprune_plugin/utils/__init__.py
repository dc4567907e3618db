"""What all rooms need and no idea owns: files, memory, processes, progress."""
