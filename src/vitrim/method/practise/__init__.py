"""PRACTISE and MiR: whole blocks dropped by how well the network recovers without them."""
