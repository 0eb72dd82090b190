def interpolate():
    pass
