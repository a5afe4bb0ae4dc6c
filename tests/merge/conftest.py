from hypothesis import settings

settings.register_profile("merge", deadline=None)  # the first torch call of a process takes longer than a deadline
settings.load_profile("merge")
