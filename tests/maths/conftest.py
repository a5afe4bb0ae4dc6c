from hypothesis import settings

settings.register_profile("maths", deadline=None)  # the first torch call of a process takes longer than a deadline
settings.load_profile("maths")
