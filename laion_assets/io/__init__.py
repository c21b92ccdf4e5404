"""Tables, storage, errors and arrays: the base of all other packages."""
