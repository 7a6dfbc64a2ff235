// Rows of quantised blocks into the x16 layout (block_array.py) and back.
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace {

using q4::kRows;

constexpr int kLine = 4 * kRows;  // Bytes of one word of each row.
constexpr int kMostBlockBytes = 256;

struct Piece { int64_t offset, size, word; };  // as in block_array.py, PIECES

template <int word>
void MovePiece(const uint8_t* in, uint8_t* out, int64_t row_bytes, const Piece& piece, bool reverse) {
  for (int64_t row = 0; row < kRows; row++) {
    for (int64_t at = 0; at < piece.size; at += word) {
      const int64_t p = row * row_bytes + piece.offset + at, t = at * kRows + row * word;
      reverse ? memcpy(out + p, in + t, word) : memcpy(out + t, in + p, word);
    }
  }
}

// The codes of Q5_K and Q6_K between their file's words and those of formats.h, in place. As in
// code_words.py, which says what lies where.

// `count` bits of x from bit `from` on, at bit `to`.
inline uint8_t Bits(uint8_t x, int from, int count, int to) { return (uint8_t)((x >> from & ((1 << count) - 1)) << to); }

void PackQ5(uint8_t* lines) {
  uint8_t file[40 * kLine];
  memcpy(file, lines, sizeof file);
  for (int g = 0; g < 8; g++) {
    uint8_t* to = lines + 5 * kLine * g;
    for (int j = 0; j < kLine; j++) {
      uint8_t code[8];
      for (int i = 0; i < 8; i++)
        code[i] = Bits(file[(8 + g / 2 * 8 + i) * kLine + j], g % 2 * 4, 4, 0) | Bits(file[i * kLine + j], g, 1, 4);
      for (int i = 0; i < 3; i++) to[i * kLine + j] = code[i] | Bits(code[i + 5], 0, 3, 5);
      to[3 * kLine + j] = code[3] | Bits(code[5], 3, 2, 5) | Bits(code[7], 3, 1, 7);
      to[4 * kLine + j] = code[4] | Bits(code[6], 3, 2, 5) | Bits(code[7], 4, 1, 7);
    }
  }
}

void UnpackQ5(uint8_t* lines) {
  uint8_t words[40 * kLine];
  memcpy(words, lines, sizeof words);
  memset(lines, 0, sizeof words);
  for (int g = 0; g < 8; g++) {
    const uint8_t* from = words + 5 * kLine * g;
    for (int j = 0; j < kLine; j++) {
      uint8_t word[5], code[8];
      for (int i = 0; i < 5; i++) word[i] = from[i * kLine + j], code[i] = Bits(word[i], 0, 5, 0);
      code[5] = Bits(word[0], 5, 3, 0) | Bits(word[3], 5, 2, 3);
      code[6] = Bits(word[1], 5, 3, 0) | Bits(word[4], 5, 2, 3);
      code[7] = Bits(word[2], 5, 3, 0) | Bits(word[3], 7, 1, 3) | Bits(word[4], 7, 1, 4);
      for (int i = 0; i < 8; i++) {
        lines[(8 + g / 2 * 8 + i) * kLine + j] |= Bits(code[i], 0, 4, g % 2 * 4);
        lines[i * kLine + j] |= Bits(code[i], 4, 1, g);
      }
    }
  }
}

void PackQ6(uint8_t* lines) {
  for (uint8_t* p = lines; p < lines + 48 * kLine; p += 3 * kLine) {
    for (int j = 0; j < kLine; j++) {
      const uint8_t h = p[j], a = p[kLine + j], b = p[2 * kLine + j];
      p[j] = Bits(a, 0, 4, 0) | Bits(h, 0, 2, 4) | Bits(h, 6, 2, 6);
      p[kLine + j] = Bits(b, 0, 4, 0) | Bits(h, 2, 2, 4) | Bits(b, 6, 2, 6);
      p[2 * kLine + j] = Bits(a, 4, 4, 0) | Bits(h, 4, 2, 4) | Bits(b, 4, 2, 6);
    }
  }
}

void UnpackQ6(uint8_t* lines) {
  for (uint8_t* p = lines; p < lines + 48 * kLine; p += 3 * kLine) {
    for (int j = 0; j < kLine; j++) {
      const uint8_t x = p[j], y = p[kLine + j], z = p[2 * kLine + j];
      p[j] = Bits(x, 4, 2, 0) | Bits(y, 4, 2, 2) | Bits(z, 4, 2, 4) | Bits(x, 6, 2, 6);
      p[kLine + j] = Bits(x, 0, 4, 0) | Bits(z, 0, 4, 4);
      p[2 * kLine + j] = Bits(y, 0, 4, 0) | Bits(z, 6, 2, 4) | Bits(y, 6, 2, 6);
    }
  }
}

}  // namespace

extern "C" {

// Interleaves (or, with `reverse`, separates) 16 rows of `blocks` blocks each. The pieces follow each
// other in a tile's block; each is cut into words, and word w of the 16 rows lies side by side. The words
// from byte `codes` of such a block on hold codes of `code_bits`, 5 or 6, to be packed anew; 0 packs none.
void q4jax_tiles(const uint8_t* in, uint8_t* out, int64_t blocks, int64_t num_pieces, const int64_t* pieces,
                      int64_t codes, int64_t code_bits, bool reverse) {
  int64_t block_bytes = 0;
  for (int64_t i = 0; i < num_pieces; i++) block_bytes += pieces[3 * i + 1];
  uint8_t scratch[kMostBlockBytes * kRows];
  for (int64_t b = 0; b < blocks; b++) {
    uint8_t* tile = reverse ? scratch : out + b * block_bytes * kRows;
    if (reverse) {
      memcpy(scratch, in + b * block_bytes * kRows, block_bytes * kRows);
      if (code_bits == 5) UnpackQ5(scratch + codes);
      if (code_bits == 6) UnpackQ6(scratch + codes);
    }
    uint8_t* at = tile;
    for (int64_t i = 0; i < num_pieces; i++) {
      const Piece piece{pieces[3 * i], pieces[3 * i + 1], pieces[3 * i + 2]};
      const uint8_t* from = reverse ? at : in + b * block_bytes;
      uint8_t* to = reverse ? out + b * block_bytes : at;
      switch (piece.word) {
        case 1: MovePiece<1>(from, to, blocks * block_bytes, piece, reverse); break;
        case 2: MovePiece<2>(from, to, blocks * block_bytes, piece, reverse); break;
        default: MovePiece<4>(from, to, blocks * block_bytes, piece, reverse);
      }
      at += piece.size * kRows;
    }
    if (!reverse && code_bits == 5) PackQ5(tile + codes);
    if (!reverse && code_bits == 6) PackQ6(tile + codes);
  }
}

}  // extern "C"
