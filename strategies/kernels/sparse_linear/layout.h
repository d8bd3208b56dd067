/* How a packed matrix lies in memory; kernel.c says what for. */
#ifndef SQUALL_SPARSE_LINEAR_LAYOUT_H
#define SQUALL_SPARSE_LINEAR_LAYOUT_H

enum { TILE = 128, TILE_COLUMNS = 127, SLICE = 64 };

/* Where a slot's column, and its code, are in a step; and whose they are. */
#define BYTE_OF(slot) (4 * ((slot) % 16) + (slot) / 16)
#define SLOT_OF(byte) (16 * ((byte) % 4) + (byte) / 4)

#endif
