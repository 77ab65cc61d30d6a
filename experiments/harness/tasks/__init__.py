"""What is trained: data, models and their scores, as one `Task`."""
