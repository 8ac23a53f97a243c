// Transforms of Winograd's F(2, 3) in three dimensions, for channels-last float32 volumes (Lavin & Gray 2015, arXiv
// 1509.09308). C is a multiple of 16. Padding is 1; sides are even.
#include <cstring>
constexpr int W = 16;
typedef float row[W];

static inline void in4(row* b, int s) {  // four rows, s apart
    for (int i = 0; i < W; i++) {
        float x0 = b[0][i], x1 = b[s][i], x2 = b[2 * s][i], x3 = b[3 * s][i];
        b[0][i] = x0 - x2; b[s][i] = x1 + x2; b[2 * s][i] = x2 - x1; b[3 * s][i] = x1 - x3;
    }
}
static inline void in4t(row* b, int s) {  // B v
    for (int i = 0; i < W; i++) {
        float v0 = b[0][i], v1 = b[s][i], v2 = b[2 * s][i], v3 = b[3 * s][i];
        b[0][i] = v0; b[s][i] = v1 - v2 + v3; b[2 * s][i] = v1 + v2 - v0; b[3 * s][i] = -v3;
    }
}
extern "C" {
void input_transform(const float* x, float* v, int B, int X, int Y, int Z, int C) {
    long n = (long)B * (X / 2) * (Y / 2) * (Z / 2), t = 0;
    alignas(64) row b[64];
    for (int s = 0; s < B; s++) for (int i = 0; i < X; i += 2) for (int j = 0; j < Y; j += 2) for (int k = 0; k < Z; k += 2, t++)
        for (int c = 0; c < C; c += W) {
            for (int p = 0; p < 4; p++) for (int q = 0; q < 4; q++) for (int r = 0; r < 4; r++) {
                int xx = i + p - 1, yy = j + q - 1, zz = k + r - 1;
                row& d = b[16 * p + 4 * q + r];
                if (xx < 0 || yy < 0 || zz < 0 || xx >= X || yy >= Y || zz >= Z) memset(d, 0, sizeof(row));
                else memcpy(d, x + ((((long)s * X + xx) * Y + yy) * Z + zz) * C + c, sizeof(row));
            }
            for (int p = 0; p < 16; p++) in4(b + 4 * p, 1);
            for (int p = 0; p < 4; p++) for (int r = 0; r < 4; r++) in4(b + 16 * p + r, 4);
            for (int q = 0; q < 16; q++) in4(b + q, 16);
            for (int e = 0; e < 64; e++) memcpy(v + (e * n + t) * C + c, b[e], sizeof(row));
        }
}
void input_transform_t(const float* v, float* x, int B, int X, int Y, int Z, int C) {  // adds to x
    long n = (long)B * (X / 2) * (Y / 2) * (Z / 2), t = 0;
    alignas(64) row b[64];
    for (int s = 0; s < B; s++) for (int i = 0; i < X; i += 2) for (int j = 0; j < Y; j += 2) for (int k = 0; k < Z; k += 2, t++)
        for (int c = 0; c < C; c += W) {
            for (int e = 0; e < 64; e++) memcpy(b[e], v + (e * n + t) * C + c, sizeof(row));
            for (int p = 0; p < 16; p++) in4t(b + 4 * p, 1);
            for (int p = 0; p < 4; p++) for (int r = 0; r < 4; r++) in4t(b + 16 * p + r, 4);
            for (int q = 0; q < 16; q++) in4t(b + q, 16);
            for (int p = 0; p < 4; p++) for (int q = 0; q < 4; q++) for (int r = 0; r < 4; r++) {
                int xx = i + p - 1, yy = j + q - 1, zz = k + r - 1;
                if (xx < 0 || yy < 0 || zz < 0 || xx >= X || yy >= Y || zz >= Z) continue;
                float* d = x + ((((long)s * X + xx) * Y + yy) * Z + zz) * C + c;
                const row& a = b[16 * p + 4 * q + r];
                for (int w = 0; w < W; w++) d[w] += a[w];
            }
        }
}
void output_transform(const float* m, const float* bias, float* y, int B, int X, int Y, int Z, int C) {
    long n = (long)B * (X / 2) * (Y / 2) * (Z / 2), t = 0;
    alignas(64) row b[64];
    for (int s = 0; s < B; s++) for (int i = 0; i < X; i += 2) for (int j = 0; j < Y; j += 2) for (int k = 0; k < Z; k += 2, t++)
        for (int c = 0; c < C; c += W) {
            for (int e = 0; e < 64; e++) memcpy(b[e], m + (e * n + t) * C + c, sizeof(row));
            auto fold = [&](int o, int st) { for (int w = 0; w < W; w++) {
                float a0 = b[o][w], a1 = b[o + st][w], a2 = b[o + 2 * st][w], a3 = b[o + 3 * st][w];
                b[o][w] = a0 + a1 + a2; b[o + st][w] = a1 - a2 - a3; } };
            for (int p = 0; p < 16; p++) fold(4 * p, 1);
            for (int p = 0; p < 4; p++) for (int r = 0; r < 2; r++) fold(16 * p + r, 4);
            for (int q = 0; q < 2; q++) for (int r = 0; r < 2; r++) fold(4 * q + r, 16);
            for (int p = 0; p < 2; p++) for (int q = 0; q < 2; q++) for (int r = 0; r < 2; r++) {
                float* d = y + ((((long)s * X + i + p) * Y + j + q) * Z + k + r) * C + c;
                const row& a = b[16 * p + 4 * q + r];
                for (int w = 0; w < W; w++) d[w] = a[w] + bias[c + w];
            }
        }
}
void output_transform_t(const float* y, float* m, int B, int X, int Y, int Z, int C) {
    long n = (long)B * (X / 2) * (Y / 2) * (Z / 2), t = 0;
    alignas(64) row b[64];
    for (int s = 0; s < B; s++) for (int i = 0; i < X; i += 2) for (int j = 0; j < Y; j += 2) for (int k = 0; k < Z; k += 2, t++)
        for (int c = 0; c < C; c += W) {
            for (int p = 0; p < 2; p++) for (int q = 0; q < 2; q++) for (int r = 0; r < 2; r++)
                memcpy(b[16 * p + 4 * q + r], y + ((((long)s * X + i + p) * Y + j + q) * Z + k + r) * C + c, sizeof(row));
            auto spread = [&](int o, int st) { for (int w = 0; w < W; w++) {
                float a0 = b[o][w], a1 = b[o + st][w];
                b[o + st][w] = a0 + a1; b[o + 2 * st][w] = a0 - a1; b[o + 3 * st][w] = -a1; } };
            for (int q = 0; q < 2; q++) for (int r = 0; r < 2; r++) spread(4 * q + r, 16);
            for (int p = 0; p < 4; p++) for (int r = 0; r < 2; r++) spread(16 * p + r, 4);
            for (int p = 0; p < 16; p++) spread(4 * p, 1);
            for (int e = 0; e < 64; e++) memcpy(m + (e * n + t) * C + c, b[e], sizeof(row));
        }
}
}
