def sample():
    pass
