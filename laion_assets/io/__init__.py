"""Tables, storage, errors and arrays: what every other package builds on."""
