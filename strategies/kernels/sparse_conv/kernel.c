/* Direct sparse convolution: a live weight is one shifted multiply-add over many output pixels.
 *
 * Inputs are packed first, so that what a weight reads for consecutive output pixels is consecutive: a channel is a row
 * of numbers, rows of the image `pitch` pixels apart with zeros between them (one gap serves both neighbours), strides
 * taken apart into phases. An output pixel has the same place in its row, so a tile of TILE x 16 numbers of the output
 * is TILE registers, and the weight's offset says where its inputs begin. Pixels in the gaps are computed too, and
 * thrown away.
 *
 * A register is 16 neighbours in a row, or one pixel of 16 lanes beside each other: lanes are the images of a block,
 * each cut into strips of as many rows if these are fewer than lanes. Strips bring their neighbours' rows along as far
 * as kernels reach, so to all that follows they are images. Then whatever a weight reads begins where a register does.
 *
 * Input channels come in blocks that stay in the nearest cache while all outputs go over them; a tile's sums stay in
 * the next one meanwhile.
 */
#include "../native/native.h"
#include "../native/numbers.h"

typedef squall_numbers vector;

enum { WIDTH = SQUALL_WIDTH, MOST = 14 };

/* What a lane is: an image of the block, and its strip's first row; in rows of a phase for what is read. */
struct lane {
    int64_t image, top;
};

struct pack {
    const float *x;
    float *packed;
    int64_t channels, height, width;            /* of x */
    int64_t samples, lanes, images;             /* images of a block */
    struct lane lane[WIDTH];
    int64_t stride_y, stride_x, num_phases;
    const int64_t *phases;                      /* y and x of each */
    int64_t first_y, rows, columns, pitch;      /* of a phase: rows from first_y on, which may lie outside of x */
    int64_t guard, phase_size, channel_size;    /* numbers */
};

struct conv {
    const float *packed;
    const float *values;
    const int32_t *offsets;
    const int64_t *starts;                      /* of a block's and output's weights: (groups, blocks, outputs) + 1 */
    const float *bias;                          /* or NULL */
    float *y;
    float *scratch;
    float *staged;                              /* finished sums whose lanes are still to be taken apart, or NULL */
    int32_t *places;                            /* in what is staged of a strip, of its pixels */
    int64_t samples, lanes, images;             /* images of a block */
    struct lane lane[WIDTH];
    int64_t groups, inputs, outputs;            /* inputs and outputs of a group */
    int64_t blocks, block_size;                 /* blocks of input channels */
    int64_t image_height, height, width, pitch; /* of the output, and of a strip of it */
    int64_t row_distance;                       /* numbers from a row to the next */
    int64_t numbers;                            /* of an output channel, from the first pixel to the last */
    int64_t tile_width, tile_rows;              /* registers of a tile beside each other, and below */
    int64_t tile_size;                          /* in numbers */
    int64_t tiles;                              /* of a channel */
    int64_t row_tiles;                          /* beside each other, or 0 if they run on from row to row */
    int64_t guard, channel_size;
    int64_t parts;                              /* of a group's outputs, each a thread's work */
    int64_t num_scratch;
    int relu;
    /* of the weight's gradient */
    const float *grad;
    int64_t grad_channel_size;
    float *result;
    int64_t slices;
};

static int64_t at_most(int64_t most, int64_t number)
{
    return number < most ? number : most;
}

static void fill_zero(float *begin, float *end)
{
    memset(begin, 0, (size_t)(end - begin) * sizeof(float));
}

struct tile {
    int64_t begin, width, rows; /* in an output channel; registers */
};

static int64_t column_tiles(const struct conv *c)
{
    return (c->height + c->tile_rows - 1) / c->tile_rows;
}

/* Where a tile lies, and how much of it there is. Those below come first: they read mostly the same. */
static struct tile tile_at(const struct conv *c, int64_t number)
{
    struct tile tile = {number * c->tile_width * WIDTH, c->tile_width, 1};
    int64_t end = c->numbers;
    if (c->row_tiles) {
        int64_t row = number % column_tiles(c) * c->tile_rows;
        tile.begin = row * c->row_distance + number / column_tiles(c) * c->tile_width * WIDTH;
        tile.rows = at_most(c->tile_rows, c->height - row);
        end = row * c->row_distance + c->width * c->lanes;
    }
    tile.width = at_most(c->tile_width, (end - tile.begin + WIDTH - 1) / WIDTH);
    return tile;
}

static void count_tiles(struct conv *c)
{
    c->row_distance = c->pitch * c->lanes;
    c->tile_size = c->tile_width * c->tile_rows * WIDTH;
    c->numbers = (c->height - 1) * c->row_distance + c->width * c->lanes;
    c->tiles = c->row_tiles ? column_tiles(c) * c->row_tiles
                            : (c->numbers + WIDTH * c->tile_width - 1) / (WIDTH * c->tile_width);
}

static int64_t num_blocks_of(const struct conv *c)
{
    return (c->samples + c->images - 1) / c->images;
}

/* A run of output pixels of a tile that are neighbours in a row of the image. */
struct run {
    int64_t from, to, num; /* numbers of the tile, pixels of the strip, pixels */
};

/* Where a tile's numbers belong; returns how many runs there are. */
static int runs_of(const struct conv *c, struct tile tile, struct run *runs)
{
    int count = 0;
    for (int row = 0; row < tile.rows; row++) {
        int64_t begin = tile.begin + row * c->row_distance, num = tile.width * WIDTH;
        int64_t place = begin / c->lanes, end = (begin + num) / c->lanes; /* in pixels, gaps included */
        for (int64_t y = place / c->pitch; y < c->height && place < end; y++, place = y * c->pitch) {
            int64_t last = y * c->pitch + c->width;
            if (last > end)
                last = end;
            if (place < last) {
                struct run run = {place * c->lanes - begin + row * num, y * c->width + place - y * c->pitch,
                                      last - place};
                runs[count++] = run;
            }
        }
    }
    return count;
}

/* Say for each pixel of a strip where in what is staged of it its lanes are. */
static void find_places(const struct conv *c)
{
    struct run runs[MOST * WIDTH];
    for (int64_t number = 0; number < c->tiles; number++) {
        int num_runs = runs_of(c, tile_at(c, number), runs);
        for (int run = 0; run < num_runs; run++)
            for (int64_t i = 0; i < runs[run].num; i++)
                c->places[runs[run].to + i] = (int32_t)(number * c->tile_size + runs[run].from + i * WIDTH);
    }
}

static void find_lanes(struct lane *lane, int64_t strips, int64_t height)
{
    for (int64_t i = 0; i < WIDTH; i++) {
        lane[i].image = i / strips;
        lane[i].top = i % strips * height;
    }
}

#define TEMPLATE "../sparse_conv/template.h"
#include "../native/each_isa.h"

/* (samples, channels, height, width) to (blocks of samples, channels, phases, rows, pitch, lanes). */
SQUALL_EXPORT void squall_sparse_conv_pack(const float *x, float *packed, int64_t samples, int64_t channels,
                                           int64_t height, int64_t width, int64_t lanes, int64_t images, int64_t strips,
                                           int64_t strip_height, int64_t stride_y, int64_t stride_x,
                                           const int64_t *phases, int64_t num_phases, int64_t first_y, int64_t rows,
                                           int64_t columns, int64_t pitch, int64_t guard, int64_t channel_size,
                                           int num_threads)
{
    struct pack pack = {.x = x, .packed = packed, .channels = channels, .height = height, .width = width,
                        .samples = samples, .lanes = lanes, .images = images, .stride_y = stride_y,
                        .stride_x = stride_x, .num_phases = num_phases, .phases = phases, .first_y = first_y,
                        .rows = rows, .columns = columns, .pitch = pitch, .guard = guard,
                        .phase_size = rows * pitch * lanes, .channel_size = channel_size};
    find_lanes(pack.lane, strips, strip_height);
    squall_parallel(SQUALL_PICK(pack), &pack, (samples + images - 1) / images * channels, num_threads);
}

SQUALL_EXPORT void squall_sparse_conv(const float *packed, const float *values, const int32_t *offsets,
                                      const int64_t *starts, const float *bias, float *y, float *scratch, float *staged,
                                      int32_t *places, int64_t num_scratch, int64_t samples, int64_t lanes,
                                      int64_t images, int64_t strips, int64_t groups, int64_t inputs, int64_t outputs,
                                      int64_t blocks, int64_t block_size, int64_t image_height, int64_t height,
                                      int64_t width, int64_t pitch, int64_t tile_width, int64_t tile_rows,
                                      int64_t row_tiles, int64_t guard, int64_t channel_size, int relu,
                                      int num_threads)
{
    struct conv conv = {.packed = packed, .values = values, .offsets = offsets, .starts = starts, .bias = bias,
                        .y = y, .scratch = scratch, .staged = staged, .places = places, .samples = samples,
                        .lanes = lanes, .images = images, .groups = groups, .inputs = inputs, .outputs = outputs,
                        .blocks = blocks, .block_size = block_size, .image_height = image_height, .height = height,
                        .width = width, .pitch = pitch, .tile_width = tile_width, .tile_rows = tile_rows,
                        .row_tiles = row_tiles, .guard = guard, .channel_size = channel_size,
                        .num_scratch = num_scratch, .relu = relu};
    count_tiles(&conv);
    find_lanes(conv.lane, strips, height);
    /* A few tiles are one image of few pixels: then threads share its outputs, too. */
    int64_t num_tasks = num_blocks_of(&conv) * groups * conv.tiles, most = outputs > 0 ? outputs : 1;
    conv.parts = num_threads > 1 && num_tasks > 0 ? (4 * num_threads + num_tasks - 1) / num_tasks : 1;
    if (conv.parts > most)
        conv.parts = most;
    squall_parallel(SQUALL_PICK(forward), &conv, num_tasks * conv.parts, num_threads);
    if (staged) {
        find_places(&conv);
        squall_parallel(SQUALL_PICK(unstage), &conv, num_blocks_of(&conv) * groups * outputs, num_threads);
    }
}

/* The weights' gradients, one number a live weight; `grad` is packed like the output, with zeros in the gaps. */
SQUALL_EXPORT void squall_sparse_conv_weight_grad(const float *packed, const float *grad, const int32_t *offsets,
                                                  const int64_t *starts, float *result, int64_t samples,
                                                  int64_t lanes, int64_t images, int64_t groups, int64_t inputs,
                                                  int64_t outputs, int64_t blocks, int64_t block_size, int64_t height,
                                                  int64_t width, int64_t pitch, int64_t tile_width, int64_t tile_rows,
                                                  int64_t row_tiles, int64_t guard, int64_t channel_size,
                                                  int64_t grad_channel_size, int64_t slices, int num_threads)
{
    struct conv conv = {.packed = packed, .grad = grad, .offsets = offsets, .starts = starts, .result = result,
                        .samples = samples, .lanes = lanes, .images = images, .groups = groups, .inputs = inputs,
                        .outputs = outputs, .blocks = blocks, .block_size = block_size, .height = height,
                        .width = width, .pitch = pitch, .tile_width = tile_width, .tile_rows = tile_rows,
                        .row_tiles = row_tiles, .guard = guard, .channel_size = channel_size,
                        .grad_channel_size = grad_channel_size, .slices = slices};
    count_tiles(&conv);
    squall_parallel(SQUALL_PICK(weight_grad), &conv, groups * slices, num_threads);
}
