"""What `sczctl doctor` looks at, a module for each part of the host. No check changes anything or raises an error."""
