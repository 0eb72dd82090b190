def reconstruct():
    pass
